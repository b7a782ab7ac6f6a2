"""Options of a run as typed, frozen, validated values."""
