"""What one mechanism spends, as pairs of laws and as moments: the vocabulary between events and accountants."""
