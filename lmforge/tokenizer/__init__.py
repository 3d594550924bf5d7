"""The tokenizer room: train one, or take the one the weights bring; text, chats and pairs become tokens."""
