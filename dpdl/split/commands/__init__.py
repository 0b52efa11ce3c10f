"""`dpdl split`: two parties train one network, each with its own command."""
