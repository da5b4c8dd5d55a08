"""Planning and running: ``plan`` plans runs from composed configurations, ``grid`` runs the plan. Imports no torch."""
