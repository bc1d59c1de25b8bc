"""What every other room needs and that knows nothing of the model: errors, files, devices, processes, terminal output."""
