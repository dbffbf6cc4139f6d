"""Shows data to people: terminal, plot, Markdown. It computes and decides nothing."""
