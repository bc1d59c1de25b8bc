"""Tools that all other folders use and that know nothing of the model: errors, files, devices, processes, output."""
