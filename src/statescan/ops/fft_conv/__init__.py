"""Long convolution by the fast Fourier transform."""
