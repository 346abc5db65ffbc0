"""Independent derivations of the published methods; they import nothing of ours."""
