"""The selective scan: the recurrence of S6 (Mamba) over a whole sequence."""
