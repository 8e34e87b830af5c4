"""Code of the Triton models that Perch publishes beside a network. Triton's own Python imports it, nothing here does."""
