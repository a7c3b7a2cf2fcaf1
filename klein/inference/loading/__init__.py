"""From files to modules on a device."""
