"""Memory, disk and time of a run before it begins, and the choices that they decide."""
