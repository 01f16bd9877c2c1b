"""What the package offers, collected from its own code: settings, sub-commands, registries."""
