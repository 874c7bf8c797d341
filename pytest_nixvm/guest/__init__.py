"""Inside the VM: one room for each channel."""
