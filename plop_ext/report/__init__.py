"""Tables for the terminal, figures, and the HTML report."""
