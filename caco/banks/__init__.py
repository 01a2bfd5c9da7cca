"""Memory banks: rows that serve as positives and negatives."""
