"""Reports for readers: text, trees, tables, pages, pictures. Nothing here computes or changes a model."""
