"""What a mode is: its model, its loss and its evaluation. Nothing about loops."""
