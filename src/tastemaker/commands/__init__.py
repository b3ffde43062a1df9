"""The commands of the command line: each a thin reading of arguments over a stage's own function."""
