"""What each stage does, from configuration to files. Nothing but the scripts of the pipeline imports from here."""
