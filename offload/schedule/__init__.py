"""Which blocks stay on the device, and which slots the others share: computed, nothing is moved."""
