"""Ray and its nodes."""
