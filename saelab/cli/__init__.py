"""The shell: `saelab collect | train | evaluate | info | demo`."""
