"""A grid of trainings: read, checked, run one after another, and found again. It knows no command line."""
