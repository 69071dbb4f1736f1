"""The training loop: it sees an iterator of batches and things that have losses, and knows neither models nor SAEs."""
