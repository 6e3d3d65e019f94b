"The embedded benchmark: drawn garments, what is asked of them, and every right answer."
