"""Looks for specs that the API server accepts and Perch cannot work with: `make fuzz`."""
