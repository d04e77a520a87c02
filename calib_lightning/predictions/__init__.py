"""Read files of predictions, score and calibrate them; a library that knows no command line."""
