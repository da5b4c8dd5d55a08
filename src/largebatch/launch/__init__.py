"""From composed configurations to runs: ``plan`` makes the plan, ``grid`` runs it. Imports no torch."""
