"""Looking at run folders. Imports no torch."""
