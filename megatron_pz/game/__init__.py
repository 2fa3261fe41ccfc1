"""The game of the paper, pure: prompts, masks, answers, rewards, advantages. Strings and numbers only."""
