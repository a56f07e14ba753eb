"""Plain torch: what an expert computes, how it learns and how it is saved. Knows no network and no clock."""
