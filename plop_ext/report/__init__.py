"""What a person looks at: tables for the terminal and pictures for everywhere else."""
