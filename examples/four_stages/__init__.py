"""Long-VITA's four stages with a small model that is really trained, from packages that anyone can
install to answers about a film of thousands of frames."""
