"""A trained model behind HTTP: OpenAI's chat completions, and a page that shows masks becoming words."""
