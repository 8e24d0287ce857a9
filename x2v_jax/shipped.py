"""What travels with the library: its version."""

VERSION = "0.1.0"
