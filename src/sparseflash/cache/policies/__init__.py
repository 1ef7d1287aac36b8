"""What a cache keeps: one policy a file. A method chooses what is read, a policy what is kept."""
