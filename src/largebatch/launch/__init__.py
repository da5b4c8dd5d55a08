"""From composed configurations to finished runs: ``plan`` decides what, ``local`` carries out. Imports no torch."""
