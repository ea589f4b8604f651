"""The processes of a run: who they are, how they meet, who starts and stops them."""
