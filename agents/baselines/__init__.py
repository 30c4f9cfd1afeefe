"""Other few-step techniques, for honest comparison."""
