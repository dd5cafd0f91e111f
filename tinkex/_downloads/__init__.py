"""Moving files: downloads that resume, archives unpacked safely."""
