"""Turns messages into token ids: templates, tokenizer, attachments in their places."""
