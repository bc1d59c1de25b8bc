"""What all other folders use and is independent of the model: errors, files, devices, processes, terminal output."""
