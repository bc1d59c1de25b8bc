"""The chat with finished runs, in the browser or in the terminal."""
