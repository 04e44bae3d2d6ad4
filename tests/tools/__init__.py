"""The scripts in ``tools/``, at tiny sizes."""
