"""RecBole's side: repairs, registration, fast paths, splits."""
