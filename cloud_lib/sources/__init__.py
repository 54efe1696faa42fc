"""Where crystals and labels come from: one module per origin, each fetched, verified and read into our columns."""
