"""Published tables, computed again: plan the cells, train what is missing, score, show."""
