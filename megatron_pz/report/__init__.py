"""What a run leaves to be read: metrics by a table of names, console, rollouts, the HTML page, comparisons."""
