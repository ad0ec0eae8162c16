"""From messages to token ids: templates, tokenizer, attachments in their places."""
