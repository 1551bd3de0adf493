"""Groups of a recipe's fields, a dataclass each."""
