"""The tests, in a folder for each part of the project, and the small models and runs that they share."""
