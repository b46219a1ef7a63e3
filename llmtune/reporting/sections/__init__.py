"""The page's sections: each `build` returns what its template shows, or None for no section."""
